"""TRL's GKDTrainer with the fused loss: beta 0 and 1.

What TRL's words mean here (``GKDTrainer.generalized_jsd_loss``):

- ``beta=0`` is the forward KL(teacher || student), ``kd_loss``; ``beta=1`` the reverse KL(student || teacher),
  ``reverse_kd_loss``. The betas between (Jensen-Shannon) are not in kdkernels yet: NotImplementedError.
- Its ``temperature`` divides both logits and brings no factor T^2: ``square_temperature=False``.
  ``GKDConfig.temperature`` is the temperature at which the student's answers are sampled; TRL's own loss is at 1
  whatever it says, and so is this.
- ``reduction="batchmean"`` is per token with a label: our ``"mean"``. ``num_items_in_batch`` is ``denominator``.
- TRL slices the logits, ``[:, :-1]``; here the labels are shifted, which saves a matrix of the logits' size.

Compared below with ``generalized_jsd_loss`` and with the gradients of a step of TRL's own trainer. Tiny random Llamas
and a tokenizer of a few words; nothing is downloaded.

    python examples/recipes/trl_gkd.py
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from typing import Any

import check
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

import kdkernels

WORDS = ("<pad>", "<end>", "user", "assistant", ":", "how", "many", "apples", "are", "there")
WORDS += ("one", "two", "three", "four", "red", "green", "and")


def gkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    beta: float,
    temperature: float = 1.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``generalized_jsd_loss`` of logits ``(B, T, V)`` with the labels of their own positions, not yet shifted."""
    losses = {0.0: kdkernels.kd_loss, 1.0: kdkernels.reverse_kd_loss}
    if beta not in losses:
        raise NotImplementedError(f"beta must be 0 (forward KL) or 1 (reverse KL) for now, got {beta}")
    return losses[beta](
        student_logits,
        teacher_logits,
        temperature,
        target=F.pad(labels[:, 1:], (0, 1), value=-100),
        class_dim=-1,
        square_temperature=False,
        denominator=num_items_in_batch,
    )


class FusedGKDTrainer(GKDTrainer):
    """GKDTrainer; on-policy sampling and everything else is TRL's."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**batch)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher_logits = self.teacher_model(**batch).logits
        loss = gkd_loss(
            outputs.logits, teacher_logits, inputs["labels"], self.beta, num_items_in_batch=num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss


def compare_losses() -> None:
    """Loss and gradient against TRL's function in float64."""
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(2, 9, 50, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(50, (2, 9))
    labels[0, :4] = labels[1, 6:] = -100
    for beta in (0.0, 1.0):
        for temperature in (1.0, 2.0):
            for count in (None, torch.tensor(17)):
                exact, leaf = student.clone().requires_grad_(), student.float().requires_grad_()
                theirs = GKDTrainer.generalized_jsd_loss(
                    exact[:, :-1], teacher[:, :-1], labels[:, 1:], beta, temperature, num_items_in_batch=count
                )
                ours = gkd_loss(leaf, teacher.float(), labels, beta, temperature, count)
                name = f"beta {beta:g}, T {temperature:g}, {'mean' if count is None else 'num_items_in_batch'}"
                check.same(f"loss and TRL's, {name}", ours, theirs)
                theirs.backward()
                ours.backward()
                check.same(f"gradient and TRL's, {name}", leaf.grad, exact.grad)
    try:
        gkd_loss(student, teacher, labels, beta=0.5)
    except NotImplementedError as error:
        check.require(f"beta 0.5 is refused: {error}", "0.5" in str(error))
    else:
        check.require("beta 0.5 is refused", False)


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <end> ' }}{% endfor %}"
    fast.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
    return fast


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **sizes, **tokens))


def chats() -> Dataset:
    answers = ("one red and two green", "three", "four green and one red and two", "two")
    question = {"role": "user", "content": "how many apples are there"}
    return Dataset.from_dict({"messages": [[question, {"role": "assistant", "content": text}] for text in answers]})


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer sees."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.gradients = check.gradients(model)


def step(trainer_class: type[GKDTrainer], beta: float, micro_batch: int) -> tuple[float, Tensor]:
    """Loss and gradients of one optimizer step over all chats."""
    keep = KeepGradients()
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            beta=beta,
            lmbda=0.0,  # the data set's answers; 1 samples the student's
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=4 // micro_batch,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = trainer_class(
            llama(1),
            llama(2),
            config,
            train_dataset=chats(),
            processing_class=word_tokenizer(),
            callbacks=[keep],
        )
        loss = trainer.train().training_loss
    return loss, keep.gradients


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.filterwarnings("ignore", module="trl")
    compare_losses()
    for beta in (0.0, 1.0):
        for micro_batch in (4, 1):
            loss, gradients = step(FusedGKDTrainer, beta, micro_batch)
            expected, expected_gradients = step(GKDTrainer, beta, micro_batch)
            name = f"beta {beta:g}, {4 // micro_batch} x {micro_batch} chats"
            check.same(f"training loss and GKDTrainer's, {name}", loss, expected)
            check.same(f"gradients and GKDTrainer's, {name}", gradients, expected_gradients)


if __name__ == "__main__":
    main()
