"""The loss head beside its peers: cases, checks, one adapter a peer."""
