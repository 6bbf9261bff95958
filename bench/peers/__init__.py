"""Drawplate and its peers, each behind the same three calls: load, start again from the same adapter, take steps."""
