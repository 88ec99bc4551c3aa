"""Training, evaluating and sampling language models; `hope_jax.cli` is the command line of it.

Each file is one idea:

    sources  vocabulary  ingest  corpus  mixture        the text, as tokens
    packing  lanes  data        batches of it by (seed, step)
    documents                   losses of rows that hold several documents
    config  presets  overrides  what a run is; key=value
    sharding  optimizer  step   the training step on a mesh
    checkpoint  metrics  run_dir  progress  interrupt   what is kept and shown
    loop  versus  command       a run, a comparison, `hope train`
    evaluate  generate  load    using a run
    inspection                  `hope data inspect`
    invocation                  the command as it was typed, for what is printed

Nothing is imported here: `hope --help` must not wait for orbax.
"""
