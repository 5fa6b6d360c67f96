"""A language model behind an OpenAI-compatible chat endpoint: asked, its answers kept, their cost known before.

What judgments are about, and how answers are read, is `evaluation`'s.
"""
