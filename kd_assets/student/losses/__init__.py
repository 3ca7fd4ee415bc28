"""The distillation losses, as pure functions of a student's outputs and a teacher's caches.

Needs torch only. Every loss is a scalar in float32 (float64 where its student is), zero when the student matches the
teacher (or what the cache says of it), a mean over what its mask selects, and zero (with zero gradient) where the mask
selects nothing; what the mask leaves out has no influence.

The shift is the same for all: row i of a top-k cache, of draws and of `topk_mask` is about token i + 1, so a batch of T
tokens has T - 1 rows, and the student's logits for them are `logits[:, :-1]`, the targets `input_ids[:, 1:]`. Logits
and rows that do not fit each other are refused. Hidden states belong to their own token and are not shifted.

Cut distributions: log-probabilities are those of the cache, true ones at temperature 1, and what they lack to 1 is the
mass outside. Those of a cache that is cut to a student's vocabulary are of the distribution over its ids alone: the
same holds of them, a student with logits for these ids only can be the teacher, and `outside_mass` enters no loss.

Legend: B documents, T positions, V vocabulary, k of top-k, s ids among the random draws of a position, H hidden size,
M selected positions or documents.
"""

from kd_assets.student.losses.cross_entropy import cross_entropy_loss
from kd_assets.student.losses.feature import Projector, feature_cosine_loss, feature_mse_loss
from kd_assets.student.losses.relation import mean_pooled, relation_angle_loss, relation_distance_loss
from kd_assets.student.losses.response import (
    Tail,
    jensen_shannon_loss,
    renormalised_response_loss,
    response_loss,
    rest_to_target_loss,
    reverse_response_loss,
)
from kd_assets.student.losses.sampled import importance_sampled_response_loss, sampled_response_loss

__all__ = [
    "Projector",
    "Tail",
    "cross_entropy_loss",
    "feature_cosine_loss",
    "feature_mse_loss",
    "importance_sampled_response_loss",
    "jensen_shannon_loss",
    "mean_pooled",
    "relation_angle_loss",
    "relation_distance_loss",
    "renormalised_response_loss",
    "response_loss",
    "rest_to_target_loss",
    "reverse_response_loss",
    "sampled_response_loss",
]
