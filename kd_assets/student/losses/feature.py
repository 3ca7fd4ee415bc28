"""Losses on hidden states of decoder blocks, and the projector that brings a student's to the teacher's size.

Legend: as of the folder; S hidden size of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from kd_assets.student.losses.logprobs import precise, selected_places


class Projector(nn.Module):
    """A linear map from one of the student's layers to each cached block of the teacher (FitNets' regressor, Romero et
    al. 2015, section 2.2, for sequences). It is trained with the student, and left out once the student is."""

    def __init__(self, layers: Mapping[str, int], *, student_hidden_size: int, teacher_hidden_size: int) -> None:
        """`layers`: field of the batch (`hidden_block_<n>`) → the student's layer that learns from it, 0-based.

        Raises ValueError for a layer below 0.
        """
        super().__init__()
        if negative := [name for name, layer in layers.items() if layer < 0]:
            raise ValueError(f"layer {layers[negative[0]]} for {negative[0]}: layers are counted from 0")
        self._layers = dict(layers)
        self.maps = nn.ModuleDict(
            {name: nn.Linear(student_hidden_size, teacher_hidden_size, bias=False) for name in layers}
        )

    def forward(self, hidden_states: Sequence[Tensor]) -> dict[str, Tensor]:
        """Field → [B, T, H], of what the student gives with `output_hidden_states=True`.

        Its entry 0 are the embeddings, entry n + 1 the output of layer n; that of the last layer has been through the
        final norm there, which a trained map takes as it comes. Raises ValueError for a layer that is not there.
        """
        n_layers = len(hidden_states) - 1
        if beyond := [name for name, layer in self._layers.items() if layer >= n_layers]:
            raise ValueError(
                f"layer {self._layers[beyond[0]]} for {beyond[0]}: the student has layers 0 to {n_layers - 1}"
            )
        return {name: linear(hidden_states[self._layers[name] + 1]) for name, linear in self.maps.items()}


def feature_mse_loss(projected_BTH: Tensor, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean squared difference of the student's projected hidden states and the teacher's, over selected tokens.

    `projected_BTH` went through the student's regressor, which is trained with it (FitNets, Romero et al. 2015,
    equation 3, with the mean over elements).
    """
    projected_MH, hidden_MH = _selected(projected_BTH, hidden_BTH, mask_BT)
    if not len(hidden_MH):
        return projected_MH.sum()
    return functional.mse_loss(projected_MH, hidden_MH)


def feature_cosine_loss(projected_BTH: Tensor, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - cosine of the student's projected hidden states and the teacher's, mean over selected tokens.

    Free of the scale of hidden states, which grows from block to block (the form of DistilBERT's L_cos, Sanh et al.
    2019, section 3).
    """
    projected_MH, hidden_MH = _selected(projected_BTH, hidden_BTH, mask_BT)
    if not len(hidden_MH):
        return projected_MH.sum()
    return (1.0 - functional.cosine_similarity(projected_MH, hidden_MH, dim=-1)).mean()


def _selected(projected_BTH: Tensor, hidden_BTH: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    places = selected_places(mask_BT, projected_BTH, hidden_BTH, shifted=False)
    projected_MH = precise(projected_BTH[places])
    return projected_MH, hidden_BTH[places].to(projected_MH.dtype)
