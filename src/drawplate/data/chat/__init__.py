"""Conversations -> text and what of it is learnt."""
