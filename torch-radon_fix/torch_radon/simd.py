"""A vector of eight float32 for Numba: eight images (or eight symmetric copies of one) share every address and weight.

Numba has no such type, and its loop vectoriser does not find these loops. In a jitted function: `zero()`,
`load(flat_array, index)`, `store(flat_array, index, v)`, `mul(v, scalar)`, `add(v, w)`,
`mul_add(v, scalar, w)` = v * scalar + w.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

LANES = 8
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class Vector(types.Type):
    def __init__(self):
        super().__init__(f"float32x{LANES}")


vector = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _VECTOR)


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, index), _VECTOR.as_pointer())


@intrinsic
def zero(typingctx):
    return vector(), lambda context, builder, signature, args: ir.Constant(_VECTOR, [0.0] * LANES)


@intrinsic
def load(typingctx, array, index):
    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=4)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


def _broadcast(builder, scalar):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def mul(typingctx, value, scalar):
    def codegen(context, builder, signature, args):
        return builder.fmul(args[0], _broadcast(builder, args[1]), flags=("contract",))

    return vector(vector, types.float32), codegen


@intrinsic
def add(typingctx, value, other):
    return vector(vector, vector), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def mul_add(typingctx, value, scalar, addend):
    def codegen(context, builder, signature, args):
        product = builder.fmul(args[0], _broadcast(builder, args[1]), flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return vector(vector, types.float32, vector), codegen
