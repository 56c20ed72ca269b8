"""Which buffer a weight's gradient is added to, told by what Megatron hangs on the weight."""

from types import SimpleNamespace

from samebit.trainer.megatron.main_grad import main_grad_of, own_gradients


def test_products_on_a_gpu_add_to_megatrons_buffer():
    weight = SimpleNamespace(is_cuda=True, main_grad="buffer")
    assert main_grad_of(weight) == "buffer"
    assert main_grad_of(SimpleNamespace(is_cuda=True)) is None


def test_autograd_is_given_gradients_on_the_cpu_and_where_something_waits_for_them():
    assert main_grad_of(SimpleNamespace(is_cuda=False, main_grad="buffer")) is None
    weight = SimpleNamespace(is_cuda=True, main_grad="buffer")
    own_gradients([weight])
    assert main_grad_of(weight) is None
