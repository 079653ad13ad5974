"""Which rate an operator runs at: its kind, one table for captured graphs and for traces of running steps.

A kind is what operators have in common whose time a cluster file gives one rate for (`weft.cluster.KINDS`):

    matmul, conv, attention, recurrent    products, bound by FLOPs where tensors are large
    norm                                  reductions, and what contains one: norms, softmax, losses, pools
    gather                                reads or writes whose place is a number that was computed, and sorts
    elementwise                           all others: they stream their operands (resampling and rolls too: places are fixed)

Names are those of exported graphs (`linear`) and of what they become when run (`addmm`, `native_layer_norm`), without namespace
and overload.
"""

from __future__ import annotations

from weft.graph.graph import Kind

__all__ = ["forward_name", "kind_of"]

_NAMES: dict[Kind, str] = {
    "matmul": "linear matmul mm addmm bmm baddbmm addbmm mv addmv dot vdot inner chain_matmul linalg_multi_dot tensordot einsum "
    "bilinear _trilinear grouped_mm_fallback grouped_mm _grouped_mm _scaled_mm _int_mm",
    "conv": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution "
    "cudnn_convolution convolution_overrideable mkldnn_convolution",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu _flash_attention_forward "
    "_efficient_attention_forward",
    "recurrent": "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mkldnn_rnn_layer _cudnn_rnn "
    "_thnn_fused_lstm_cell _thnn_fused_gru_cell",
    "norm": "layer_norm group_norm batch_norm instance_norm rms_norm native_layer_norm native_group_norm native_batch_norm "
    "cudnn_batch_norm _batch_norm_with_update _native_batch_norm_legit _fused_rms_norm _weight_norm _weight_norm_interface "
    "softmax log_softmax _softmax _log_softmax "
    "cross_entropy_loss nll_loss nll_loss_nd nll_loss2d nll_loss_forward nll_loss2d_forward mse_loss l1_loss smooth_l1_loss "
    "huber_loss binary_cross_entropy kl_div soft_margin_loss binary_cross_entropy_with_logits poisson_nll_loss "
    "hinge_embedding_loss cosine_embedding_loss margin_ranking_loss triplet_margin_loss cosine_similarity pairwise_distance "
    "cdist _cdist_forward _euclidean_dist sum mean all any count_nonzero argmax argmin nansum cumsum histc bincount var var_mean "
    "std std_mean amax amin prod norm linalg_vector_norm logsumexp cumprod logcumsumexp frobenius_norm "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool2d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d",
    "gather": "embedding embedding_dense embedding_bag _embedding_bag index gather take_along_dim index_select index_put "
    "_unsafe_index _index_put_impl scatter scatter_add scatter_reduce index_add index_copy index_fill take masked_select nonzero "
    "bucketize searchsorted max min sort topk msort argsort kthvalue median mode aminmax cummax cummin",
}
_KIND: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}


def kind_of(op: str) -> Kind:
    """The kind of an operator by its name, in place or not, forward or backward.

    >>> kind_of("addmm"), kind_of("index_put_"), kind_of("_softmax_backward_data"), kind_of("relu")
    ('matmul', 'gather', 'norm', 'elementwise')
    """
    return _KIND.get(op) or _KIND.get(forward_name(op), "elementwise")


def forward_name(op: str) -> str:
    """`gelu` for `gelu_`, `gelu_backward`, and `_softmax` for `_softmax_backward_data`."""
    return op.removesuffix("_").removesuffix("_data").removesuffix("_backward")
