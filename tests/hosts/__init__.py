"""Versions of the hosts: which of them run, measured in environments of their own. `bash launch/dev.sh hosts`."""
