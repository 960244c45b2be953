"""Training: links learn, on the program that the compiler made of a spec; backbones never change.

From the ground up:

- `loop`: the steps of any task, what they leave (checkpoints, metrics, costs, curves), and the
  processes that share them;
- `data`: records with target texts, and the hidden states over them that the inner stage learns
  from;
- `tasks`: what learns: each inner link on its own (`inner`), all links through the whole program
  (`outer`), or, to compare with, the answer agent's own backbone (`finetuning`);
- `settings`, `preflight`: the `train` section, and what is looked at before a model is loaded;
- `session`: data, backbones and links made ready; `starts`: what a stage begins with, kept;
- `run`: the stages in their order; `receipt`: the trained links, and what confirms them.

The differentiable form of the program is `lowering.training_graph`; eager execution is the
reference. Nothing here prints: figures are returned, and progress is counted where the caller shows
it.
"""
