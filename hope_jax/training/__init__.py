"""Training, evaluating and sampling language models; `hope_jax.cli` is the command line of it.

Each file is one idea:

    sources  vocabulary  ingest  corpus  mixture        the text, as tokens
    cache                       what can be made again, kept
    packing  lanes  data        batches of it by (seed, step)
    documents                   losses of rows that hold several documents
    config  presets  overrides  what a run is; key=value
    sharding  optimizer  step   the training step on a mesh
    compiled  shard_report      what the compiler makes of it: `hope shard-report`, `hope aot`
    checkpoint  checksums  files  versions  run_dir     what is kept
    distributed  interrupt  watchdog                    several processes, requests to stop, steps that do not end
    origin                      a run that begins from another
    metrics  telemetry  timing  memory  level_metrics   the records of a run
    level_health                levels that do not learn
    flops  utilisation  goodput                         how much of the devices and of the time is made use of
    progress  watch  run_view  plots  profile           what is shown
    loop  versus  command       a run, a comparison, `hope train`
    evaluate  generate  load    using a run
    inspection                  `hope data inspect`
    invocation                  the command as it was typed, for what is printed

Nothing is imported here: `hope --help` must not wait for orbax.
"""
