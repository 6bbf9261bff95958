"""What a person sees of a run: the page, the model card, the terminal's tables and its progress.

Reads `records` and formats them; measures nothing, decides nothing and never imports torch, so that a report can be
made again from record.json anywhere.
"""
