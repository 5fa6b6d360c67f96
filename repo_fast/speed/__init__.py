"""The operations of a model, what a run achieves of them, and where its time goes."""
