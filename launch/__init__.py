"""Entry points: the `pikv` command (cli.py finds a subcommand in each cmd_*.py) and the shell scripts demo.sh, test.sh and dev.sh."""
