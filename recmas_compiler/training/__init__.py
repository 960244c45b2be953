"""Training: links learn, on the program that the compiler made of a spec; backbones never change.

From the ground up:

- `loop`: the steps of any task, what they leave (checkpoints, metrics, costs, curves), and the
  processes that share them;
- `data`: records with target texts, and the hidden states over them that the inner stage learns
  from;
- `tasks`: what learns: each inner link on its own (`inner`), all links through the whole program
  (`outer`), or, to compare with, the answer agent's own backbone (`finetuning`);
- `session`: the `train` section with data, backbones and links made ready;
- `run`: the stages in their order, and the trained links with the receipt that confirms them.

The differentiable form of the program is `lowering.training_graph`; eager execution is the
reference. Nothing here prints: figures are returned, and progress is counted where the caller shows
it.
"""
