"""Faults to plant in train_gpt.py, one for each thing that the fake GPU checks."""

import torch

import train_gpt


def item_in_the_step() -> None:
    accumulate = train_gpt.accumulate_gradients

    def accumulate_and_wait(*args):
        loss = accumulate(*args)
        loss.item()
        return loss
    train_gpt.accumulate_gradients = accumulate_and_wait


def float32_logits() -> None:
    train_gpt.GPT.logits = torch.compiler.disable(train_gpt.GPT.logits)


def shape_that_recompiles() -> None:
    validate = train_gpt.validate

    def validate_in_other_batches(run):
        run.micro_batch -= 1
        loss = validate(run)
        run.micro_batch += 1
        return loss
    train_gpt.validate = validate_in_other_batches


def cpu_tensor_in_the_forward() -> None:
    tables = train_gpt.rotary_tables
    train_gpt.rotary_tables = lambda seq_len, head_dim, device: tables(seq_len, head_dim, "cpu")


def kernel_that_spills() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def square(x, size: tl.constexpr):
        rows = tl.arange(0, size)
        place = x + rows[:, None] * size + rows[None, :]
        values = tl.load(place)
        tl.store(place, tl.dot(values, values))
    schedules = train_gpt.set_schedules

    def set_schedules_and_square(*args):
        square[(1,)](torch.empty(128, 128, device="cuda"), size=128, num_warps=1)
        schedules(*args)
    train_gpt.set_schedules = set_schedules_and_square


def operation_without_cuda_kernel() -> None:
    schedules = train_gpt.set_schedules

    def set_schedules_and_attend(*args):
        q = torch.empty(1, 1, 8, 16, device="cuda")
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        schedules(*args)
    train_gpt.set_schedules = set_schedules_and_attend


def collective_of_twice_the_bytes() -> None:
    gather_rows = train_gpt.gather_rows
    train_gpt.gather_rows = lambda x: gather_rows(x.float())


FAULTS = {f.__name__: f for f in (
    item_in_the_step, float32_logits, shape_that_recompiles, cpu_tensor_in_the_forward, kernel_that_spills,
    operation_without_cuda_kernel, collective_of_twice_the_bytes)}
