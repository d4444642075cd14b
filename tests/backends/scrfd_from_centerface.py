"""CenterFace with SCRFD's nine outputs: an SCRFD file for tests, since no package ships SCRFD's weights.

insightface takes a graph with nine outputs for SCRFD: scores, boxes and keypoints at strides 8, 16 and 32, two anchors
a cell, boxes and keypoints as distances from the anchor in steps of the stride, the input (x − 127.5) / 128.
CenterFace answers on a grid of stride 4.  Here each cell of stride 8 passes on the two best of the four that it
covers, and strides 16 and 32 never find anything.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
from onnx import TensorProto, helper

OPSET = 11  # the first with GatherElements
FIELDS = {"score": 1, "box": 4, "kps": 10}


def build_scrfd(centerface: Path, target: Path, side: int | None = None) -> Path:
    """Write the graph to ``target``; ``side``: for images of side × side only, as some published files are."""
    model = onnx.load(str(centerface))
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    image = next(value.name for value in graph.input if value.name not in constants)
    heatmap, size, offset, landmarks = (output.name for output in graph.output)
    nodes: list[onnx.NodeProto] = []
    numbers = itertools.count()

    def const(name: str, value: object, kind: int = TensorProto.FLOAT) -> str:
        dims = [len(value)] if isinstance(value, list) else []
        graph.initializer.append(helper.make_tensor(name, kind, dims, value if dims else [value]))
        return name

    def node(op: str, inputs: list[str], output: str = "", n: int = 1, **attributes: object) -> str:
        name = output or f"wrapped_{next(numbers)}"
        outputs = [name] if n == 1 else [f"{name}_{i}" for i in range(n)]
        nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return name

    def ints(name: str, values: list[int]) -> str:
        return const(name, values, TensorProto.INT64)

    half, two = const("half", 0.5), const("two", 2.0)
    denormalised = node("Add", [node("Mul", ["input", const("std", 128.0)]), const("mean", 127.5)], image)
    assert denormalised == image
    network, nodes = [*nodes, *graph.node], []

    # [4 cells of stride 4, 15 values, cells of stride 8], and of the four cells the two with the highest scores
    everything = node("Concat", [heatmap, size, offset, landmarks], axis=1)
    cells = node("Reshape", [node("SpaceToDepth", [everything], blocksize=2), ints("cells", [4, 15, -1])])
    scores = node("Slice", [cells, ints("from0", [0]), ints("to1", [1]), ints("axis1", [1])])
    best = node("TopK", [scores, ints("k", [2])], "best", n=2, axis=0)
    index = node("Expand", [f"{best}_1", ints("fifteen", [1, 15, 1])])
    chosen = node("GatherElements", [cells, index], axis=0)
    names = ["score", "log_h", "log_w", "off_y", "off_x", *(f"lm_{i}" for i in range(10))]
    nodes.append(helper.make_node("Split", [chosen], names, axis=1))

    # The middle of the face, seen from the anchor at the upper left corner of its cell, in steps of the stride
    cell = node("Cast", [f"{best}_1"], to=TensorProto.FLOAT)
    dy = node("Floor", [node("Div", [cell, two])])
    dx = node("Sub", [cell, node("Mul", [dy, two])])
    middle = {}
    for axis, d, off in (("x", dx, "off_x"), ("y", dy, "off_y")):
        middle[axis] = node("Div", [node("Add", [node("Add", [d, off]), half]), two])
    extent = {axis: node("Div", [node("Exp", [f"log_{side_}"]), two]) for axis, side_ in (("x", "w"), ("y", "h"))}
    reach = {axis: node("Mul", [extent[axis], half]) for axis in "xy"}
    start = {axis: node("Sub", [middle[axis], reach[axis]]) for axis in "xy"}
    box = [node("Neg", [start["x"]]), node("Neg", [start["y"]])]
    box += [node("Add", [middle[axis], reach[axis]]) for axis in "xy"]
    keypoints = [
        node("Add", [start[axis], node("Mul", [f"lm_{2 * i + (axis == 'x')}", extent[axis]])])
        for i in range(5)
        for axis in "xy"
    ]
    outputs = []
    for field, parts in (("score", ["score"]), ("box", box), ("kps", keypoints)):
        stacked = node("Transpose", [node("Concat", parts, axis=1)], perm=[2, 0, 1])
        outputs.append(node("Reshape", [stacked, ints(f"rows_{field}", [-1, FIELDS[field]])], f"{field}_8"))
        for stride in (16, 32):  # zeros of the right shape
            step = stride // 4
            pooled = node("MaxPool", [heatmap], kernel_shape=[step, step], strides=[step, step])
            none = node("Mul", [pooled, const(f"zero_{field}_{stride}", 0.0)])
            many = node("Concat", [none] * (2 * FIELDS[field]), axis=1)
            outputs.append(
                node("Reshape", [many, ints(f"rows_{field}_{stride}", [-1, FIELDS[field]])], f"{field}_{stride}")
            )

    shape = [1, 3, side or "height", side or "width"]
    made = helper.make_graph(
        [*network, *nodes],
        "scrfd_from_centerface",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        list(graph.initializer),
    )
    for output in made.output:
        output.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto())
        output.type.tensor_type.shape.dim.add().dim_param = f"rows_{output.name}"
        output.type.tensor_type.shape.dim.add().dim_value = FIELDS[output.name.split("_")[0]]
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=7), str(target))
    return target
