"""Compressing a recommender on one machine: a dense teacher, then a pruned student that it teaches, inside a lottery ticket.

The three models are the project's own reading of Rajaram et al. 2024 (arXiv:2401.10484), who join structured pruning and
lottery tickets with attention-guided distillation and publish the names SP-SAD, LTH-SAD and SS-SAD, and no details:

    sp-sad     cut the dense model's least important units away, then train on, taught by the dense model
    lth-sad    prune the smallest entries step by step; each time rewind the survivors to an early checkpoint and train again,
               taught by the dense model
    ss-sad     sp-sad's cut to the square root of what is to be kept, then lth-sad inside it
    magnitude  the baseline: prune the smallest entries at once and train on, neither rewound nor taught

Training is the round of `strategy.one_round` on a fleet of equal devices, one of which is as good as a machine: what is
compressed here is what a federation trains, and the catalog has the same three for federations (`sp_sad` and so on).
"""

from fedprune.compress.bench import METHODS as METHODS
from fedprune.compress.bench import Bench as Bench
from fedprune.compress.bench import Fitted as Fitted
from fedprune.compress.bench import Recipe as Recipe
from fedprune.compress.cutting import rate_for as rate_for
from fedprune.compress.files import DEFAULTS as DEFAULTS
from fedprune.compress.files import compress as compress
