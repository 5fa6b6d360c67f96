"""What the ops and the trainer cost, beside plain PyTorch, other people's and the bare matrix products.

`loss_head` has the ops, `trainer` an update and its parts, `gpu` what a GPU for minutes is given; what they share is in
`measuring`.
"""
