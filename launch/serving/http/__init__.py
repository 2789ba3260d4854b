"""What clients talk to: OpenAI's completions and chat, health, metrics, a page."""
