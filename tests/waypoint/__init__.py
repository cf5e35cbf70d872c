"""Tests of the waypoint."""
