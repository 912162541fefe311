"""One choice of several tensor parallel ranks, for sets with heads on all of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tidal_vllm.kernels import DecodeArgs


@dataclass(frozen=True)
class AgreeingRanks:
    """Ranks that choose by the sum of their attention mass.

    Each rank has the mass of its own query heads. The sum over the ranks is the mass
    that one rank with all heads would find, and every rank chooses by the same numbers.
    fp32 sums of another order differ in their last bits, so blocks of nearly equal mass
    may change places with the number of ranks.

    PyTorch ops and an all-reduce of fixed shapes: nothing waits for the device, and a
    CUDA graph can hold them. They go over all of `block_lse`, whatever the lengths are.
    All ranks have to call this equally often, as they do in layers that choose.
    """

    num_sets: int
    """Sets per row, over all ranks; several ranks share each."""
    first_set: int
    """Index among them of this rank's first set."""
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    """All-reduce of a contiguous fp32 tensor; the result may be a new tensor."""

    def weighed(self, args: DecodeArgs) -> DecodeArgs:
        """What `select_blocks` chooses from, after an op that left block_lse.

        Returns:
            Arguments with one "head" for each set of this rank: its lse is 0, its
            block_lse `[num_rows, num_sets, max_blocks]` the logarithm of the mass over
            all ranks. block_lse of `args` is overwritten.
        """
        workspace, rows = args.workspace, slice(args.query.shape[0])
        assert workspace.block_lse is not None and workspace.lse is not None
        assert args.topk_blocks is not None
        here = args.topk_blocks.shape[1]
        weights = workspace.block_lse[rows]
        weights.sub_(workspace.lse[rows, :, None]).exp_()
        mass = weights.unflatten(1, (here, -1)).sum(2).nan_to_num_(0.0)
        if self.num_sets > here:
            all_sets = mass.new_zeros(mass.shape[0], self.num_sets, mass.shape[2])
            all_sets[:, self.first_set : self.first_set + here] = mass
            mass = all_sets
        if mass.numel():  # the reference ops leave no block where no row chooses
            mass = self.sum_over_ranks(mass)
        mass = mass[:, self.first_set : self.first_set + here]
        arrivals = workspace.arrivals
        if arrivals is not None:  # a counter for each set, zeros like all of them
            arrivals = arrivals.flatten()[: mass.shape[0] * here].view(-1, here)
        # Its lines begin where the kernels load four numbers at once.
        block_lse = torch.log(mass, out=workspace.block_lse[rows, :here])
        scratch = replace(
            workspace,
            lse=mass.new_zeros(mass.shape[:2]),
            block_lse=block_lse,
            arrivals=arrivals,
        )
        return replace(args, query=args.query[:, :here], workspace=scratch)
