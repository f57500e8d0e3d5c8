"""Lets a torchvision that was built for CUDA be imported beside a CPU torch: with this directory on PYTHONPATH, the two
operators that it describes while it is imported are known, though its own library does not load. For tests only."""

import importlib.util

if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
