"""A small random model that reads characters and has a chat template."""

from samebit.recipes.models.tiny_model import make_random_model, write_character_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_speaker(folder, **shape):
    """Write it into a folder, which is returned; shape: see make_random_model."""
    size = write_character_tokenizer(folder, "".join(map(chr, (10, *range(32, 127)))))
    make_random_model(folder, "qwen3", 3, tied=True, vocab_size=size, **shape)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
