"""The subcommands of `pikv`: one file each, found by cli.py; a leading underscore marks what they share."""
