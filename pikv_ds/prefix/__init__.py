"""Requests that begin like an earlier one: token ids and numbers of rows, no tensor. What lies where is pages/parked.py's."""
