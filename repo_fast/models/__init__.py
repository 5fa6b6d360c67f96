"""Policies, critics and score models: their folders, attention, adapters, vocabulary, loss head."""
