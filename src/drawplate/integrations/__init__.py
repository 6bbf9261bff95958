"""Drawplate's parts inside other people's loops, and other people's trackers beside Drawplate's loop."""
