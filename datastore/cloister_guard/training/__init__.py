"""Differentially private training: graphs of one sample, isolated gradients, exact noise, Opacus around them.

Importing this package loads no torch; its modules do, except `facts`. Where to look:

- `planning.prepare` checks a plan and a model before anything is charged;
- `loop.train` trains, `rehearsal.rehearse` does the same on mock rows, `evaluation.evaluate` counts for a metric;
- `ops`, `interpreter`: what a graph may hold, and how it is run; `isolate`, `noise`, `sampler`, `optimizer`: DP-SGD.
"""
