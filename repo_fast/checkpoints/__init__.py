"""What a checkpoint is on disk: safetensors and JSON under one manifest of sums, to be read by any number of ranks.

`files` writes a file and takes its sum on the way, `manifest` says whether what was written is still there, and
`pieces` finds the slices of a tensor in the files of the ranks that wrote them. Nothing here knows an engine or a run.
"""
