"""Entry points: the `pikv` command (a subcommand in each file of commands/) and the shell scripts demo.sh, test.sh and dev.sh."""
