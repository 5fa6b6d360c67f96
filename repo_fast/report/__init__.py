"""What a run leaves behind and what it shows. Only rank 0 creates these objects.

`metrics` and `samples` are the files of a run, made by `jsonl` and published whole by `folders`; `progress` is its
display, `plots` its pictures, `measures` the safety measures per prompt, and `tables` the printed tables. `comparison`,
`evaluations` and `page` are of policies side by side, `preferences` of score models; `run_page` is the page of a run,
`page_server` shows it while the run goes on. Nothing is imported here: rich, Matplotlib and TensorBoard take seconds to
load, and each module loads its own only where it uses it.
"""
