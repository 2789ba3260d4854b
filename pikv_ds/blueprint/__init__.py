"""From a configuration and a model's layers to what a cache is made of; which methods combine."""
