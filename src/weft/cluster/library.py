"""Named devices and links: figures from data sheets, scaled to what eager training attains.

A data sheet gives peaks. What operators reach is less, so every rate below is peak x attained fraction (`ATTAINED`, one table for
all accelerators). These are starting values for planning machines that are not at hand; `weft profile` measures a
machine and replaces them. Peaks are dense (no structured sparsity), FLOP/s and bytes/s; memory is what the card carries.

    DEVICES    name -> Device       device("A100-80GB") also takes "a100_80gb", and answers "A10O" with the nearest names
    LINKS      name -> Link         link_type("nvlink3")

Sources of peaks, by row:
    H200, H100, H100-PCIe   NVIDIA H100 Tensor Core GPU data sheet and Hopper architecture whitepaper v1.04; H200 data sheet
    B200                    NVIDIA HGX B200 data sheet, an eighth of the board
    A100-*                  NVIDIA A100 data sheet and Ampere architecture whitepaper v1.0
    V100-*, P100, T4        NVIDIA V100 data sheet; P100 data sheet (SXM2); Turing architecture whitepaper (T4)
    L4, L40S, A10           NVIDIA data sheets; tensor figures halved where the sheet counts sparsity
    RTX 3090, RTX 4090      GA102 whitepaper v2.0; Ada architecture whitepaper v1.1: half precision with float32 accumulation
    RTX 2080 Ti, TITAN RTX  Turing architecture whitepaper, likewise
    MI250, MI300X           AMD Instinct MI250 and MI300X data sheets. torch sees an MI250 as two devices: the row is one of them
    cpu-core                no sheet: one core of a current x86 server with AVX2 or better running torch with one thread,
                            rounded from `weft profile` runs with all cores busy
"""

from __future__ import annotations

from typing import NamedTuple

from weft.cluster.device import ClusterError, Device, Link, Rate
from weft.names import pick

__all__ = ["ATTAINED", "DEVICES", "LINKS", "device", "link_type", "usual_link"]

GIB = 2**30
TERA = 1e12


class Peak(NamedTuple):
    """One data sheet: memory in GB (as sold: 2^30 bytes), bandwidth in GB/s, dense TFLOP/s by dtype."""

    memory: float
    bandwidth: float
    float64: float
    float32: float  # without tensor cores, as torch multiplies matrices by default
    float16: float  # tensor cores, float32 accumulation
    bfloat16: float | None  # None: no hardware for it; runs at the float32 rate
    tf32: float | None  # tensor cores on float32 operands, which torch uses for convolutions by default
    link: str  # how cards of one machine are usually joined


PEAKS = {
    #                      GB     GB/s   fp64  fp32   fp16   bf16    tf32   link
    "B200":          Peak(180,  7700.0, 37.0, 75.0, 2250.0, 2250.0, 1125.0, "nvlink5"),
    "H200":          Peak(141,  4800.0, 34.0, 67.0,  989.0,  989.0,  494.0, "nvlink4"),
    "H100":          Peak(80,   3350.0, 34.0, 67.0,  989.0,  989.0,  494.0, "nvlink4"),
    "H100-PCIe":     Peak(80,   2000.0, 26.0, 51.0,  756.0,  756.0,  378.0, "pcie5"),
    "A100-80GB":     Peak(80,   2039.0,  9.7, 19.5,  312.0,  312.0,  156.0, "nvlink3"),
    "A100-40GB":     Peak(40,   1555.0,  9.7, 19.5,  312.0,  312.0,  156.0, "nvlink3"),
    "A100-80GB-PCIe": Peak(80,  1935.0,  9.7, 19.5,  312.0,  312.0,  156.0, "pcie4"),
    "A10":           Peak(24,    600.0, 0.97, 31.2,  125.0,  125.0,   62.5, "pcie4"),
    "L40S":          Peak(48,    864.0,  1.4, 91.6,  362.0,  362.0,  183.0, "pcie4"),
    "L4":            Peak(24,    300.0, 0.49, 30.3,  121.0,  121.0,   60.0, "pcie4"),
    "V100-32GB":     Peak(32,    900.0,  7.8, 15.7,  125.0,   None,   None, "nvlink2"),
    "V100-16GB":     Peak(16,    900.0,  7.8, 15.7,  125.0,   None,   None, "nvlink2"),
    "P100":          Peak(16,    732.0,  5.3, 10.6,   21.2,   None,   None, "nvlink1"),
    "T4":            Peak(16,    320.0, 0.25,  8.1,   65.0,   None,   None, "pcie3"),
    "RTX-4090":      Peak(24,   1008.0, 1.29, 82.6,  165.2,  165.2,   82.6, "pcie4"),
    "RTX-3090":      Peak(24,    936.0, 0.56, 35.6,   71.0,   71.0,   35.6, "pcie4"),
    "RTX-2080-Ti":   Peak(11,    616.0, 0.42, 13.4,   53.8,   None,   None, "pcie3"),
    "TITAN-RTX":     Peak(24,    672.0, 0.51, 16.3,  130.5,   None,   None, "pcie3"),
    "MI300X":        Peak(192,  5300.0, 81.7, 163.4, 1307.4, 1307.4, 653.7, "infinity-fabric"),
    "MI250":         Peak(64,   1638.4, 22.6, 22.6,  181.0,  181.0,   None, "infinity-fabric"),
}  # fmt: skip

# Fraction of the peak FLOP/s and of the peak memory bandwidth that eager training reaches on layers of usual size. Ours,
# rounded: large matrix products reach 0.6 to 0.75 of the tensor-core peak, streaming kernels 0.75 to 0.85 of the memory's.
ATTAINED = {
    "matmul": (0.65, 0.80),
    "conv": (0.50, 0.70),
    "attention": (0.45, 0.70),
    "recurrent": (0.30, 0.60),
    "norm": (0.50, 0.70),
    "elementwise": (0.50, 0.80),
    "gather": (0.50, 0.50),
    "optimizer": (0.50, 0.75),
}
TENSOR_KINDS = ("matmul", "conv", "attention", "recurrent")
STEP = 3e-4  # seconds that the host's Python takes for a training step besides its operators: `weft.run` of a perceptron of 20k
# weights in one process on a server's core, less the operators. `weft profile` does not measure it, and writes this
LAUNCH = 5e-6  # seconds for the host to launch one operator: what small operators cost on a GPU
USABLE = 0.94  # of the card's memory: the rest is the driver's context, libraries and the allocator's slack


def _accelerator(kind: str, peak: Peak) -> Device:
    vector = {"float64": peak.float64, "float32": peak.float32}
    tensor = {**vector, "float16": peak.float16, "bfloat16": peak.bfloat16 or peak.float32}
    conv = {**tensor, "float32": peak.tf32 or peak.float32}
    rates = {}
    for operator, (of_flops, of_bandwidth) in ATTAINED.items():
        peaks = conv if operator == "conv" else tensor if operator in TENSOR_KINDS else vector
        flops = {dtype: value * TERA * of_flops for dtype, value in peaks.items()}
        rates[operator] = Rate(flops, peak.bandwidth * 1e9 * of_bandwidth, LAUNCH)
    return Device(kind, kind, int(peak.memory * GIB * USABLE), rates, step=STEP)


def _core() -> Device:
    def rate(gflops: float, gbps: float, overhead: float) -> Rate:
        return Rate(
            {
                "float32": gflops * 1e9,
                "float64": gflops * 0.5e9,
                "bfloat16": gflops * 0.25e9,
                "float16": gflops * 0.25e9,
            },
            gbps * 1e9,
            overhead,
        )

    return Device(
        "cpu-core",
        "cpu-core",
        4 * GIB,
        {
            "matmul": rate(60, 10, 1.5e-5),
            "conv": rate(50, 6, 3e-5),
            "attention": rate(25, 8, 3e-5),
            "recurrent": rate(40, 4, 1e-4),
            "norm": rate(15, 8, 1.5e-5),
            "elementwise": rate(7, 15, 1e-5),
            "gather": rate(1, 8, 1.5e-5),
            "optimizer": rate(8, 8, 2e-5),
        },
        overlap=0.3,
        step=STEP,
    )


DEVICES: dict[str, Device] = {**{kind: _accelerator(kind, peak) for kind, peak in PEAKS.items()}, "cpu-core": _core()}

# One direction between two devices, as collectives attain it, about 0.75 of the peak in the comment.
LINKS: dict[str, Link] = {
    "nvlink5": Link(4e-6, 680e9),  # 900 GB/s a direction (Blackwell, 18 links of 50)
    "nvlink4": Link(4e-6, 340e9),  # 450 GB/s (Hopper, 18 links of 25)
    "nvlink3": Link(5e-6, 225e9),  # 300 GB/s (Ampere, 12 links of 25); 8 A100 attain 227 GB/s (vTrain's measurements)
    "nvlink2": Link(5e-6, 130e9),  # 150 GB/s (Volta, 6 links of 25); 8 V100 attain 136 GB/s (vTrain's measurements)
    "nvlink1": Link(6e-6, 60e9),  # 80 GB/s (Pascal, 4 links of 20)
    "infinity-fabric": Link(
        1e-5, 75e9
    ),  # 100 GB/s between MI250 packages of one board (AMD CDNA 2 whitepaper); MI300X 128 at best
    "pcie5": Link(8e-6, 45e9),  # 63 GB/s, 16 lanes (PCI-SIG)
    "pcie4": Link(8e-6, 22e9),  # 31.5 GB/s, 16 lanes
    "pcie3": Link(1e-5, 11e9),  # 15.8 GB/s, 16 lanes
    "infiniband-xdr": Link(5e-6, 90e9, shared=True),  # 800 Gbit/s a port (IBTA roadmap); one port serves the host
    "infiniband-ndr": Link(5e-6, 45e9, shared=True),  # 400 Gbit/s
    "infiniband-hdr": Link(6e-6, 22.5e9, shared=True),  # 200 Gbit/s
    "infiniband-edr": Link(6e-6, 11.2e9, shared=True),  # 100 Gbit/s
    "ethernet-100g": Link(2e-5, 11e9, shared=True),  # TCP over 100 Gbit/s
    "ethernet-25g": Link(2.5e-5, 2.8e9, shared=True),
    "ethernet-10g": Link(3e-5, 1.1e9, shared=True),
    "ethernet-1g": Link(6e-5, 0.117e9, shared=True),
    # gloo between processes of one machine: kernel sockets, two copies and the reduction. The latency is that of messages between
    # computing, when the other process has to be woken; back to back they take a third
    "loopback": Link(3e-4, 1.2e9),
    "wan": Link(3e-2, 12.5e6, shared=True),  # 100 Mbit/s and 60 ms there and back: a home or office line
}


def device(name: str) -> Device:
    """The library's device of that name. Raises ClusterError with the nearest names if there is none."""
    try:
        return pick(name, DEVICES, "device")
    except ValueError as error:
        raise ClusterError("", str(error)) from None


def link_type(name: str) -> Link:
    """The library's link of that name. Raises ClusterError with the nearest names if there is none."""
    try:
        return pick(name, LINKS, "link")
    except ValueError as error:
        raise ClusterError("", str(error)) from None


def usual_link(kind: str) -> Link:
    """The link that usually joins devices of a library kind within one machine: "loopback" for CPU cores."""
    peak = PEAKS.get(device(kind).kind)
    return LINKS[peak.link if peak else "loopback"]
