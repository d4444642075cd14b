"""Recorded data of tests, and the scripts that recorded it."""
