"""Programs that commands start on every rank."""
