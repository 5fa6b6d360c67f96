"""What the ops cost, beside plain PyTorch, other people's ops and the bare matrix products; see test_loss_head.py."""
