"""A language model behind an OpenAI-compatible chat endpoint: asked, its answers kept, their cost known before.

Single responses are rated here; comparisons of two are `evaluation`'s.
"""
