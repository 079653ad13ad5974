"""What can go on the wire in place of a tensor; every name is a class of `weft.comm.codec.Codec`.

    identity, cast          all of it, or in half the bits                          linear
    low-rank                two thin factors, by power iteration                    linear, biased
    shared-rand-k           random entries, the same on all ranks                   linear, unbiased or a contraction
    top-k                   the largest entries                                     biased
    rand-k                  random entries, positions by seed                       unbiased or a contraction
    quantise                2 to 8 bits an entry                                    unbiased or nearest
    sign                    1 bit an entry                                          biased
    scalar-seed             projections on directions drawn from a seed             unbiased or a contraction

Biased codecs need an error feedback (`weft.comm.memories`) to converge.
"""

from __future__ import annotations

from weft.comm.codec import Codec
from weft.comm.codecs.low_rank import LowRank
from weft.comm.codecs.plain import Cast, Identity
from weft.comm.codecs.quantise import Quantise
from weft.comm.codecs.rand_k import RandK, SharedRandK
from weft.comm.codecs.scalar_seed import ScalarSeed
from weft.comm.codecs.sign import Sign
from weft.comm.codecs.top_k import TopK

__all__ = ["CODECS", "Cast", "Identity", "LowRank", "Quantise", "RandK", "ScalarSeed", "SharedRandK", "Sign", "TopK"]

CODECS: dict[str, type[Codec]] = {
    "cast": Cast,
    "identity": Identity,
    "low-rank": LowRank,
    "quantise": Quantise,
    "rand-k": RandK,
    "scalar-seed": ScalarSeed,
    "shared-rand-k": SharedRandK,
    "sign": Sign,
    "top-k": TopK,
}
