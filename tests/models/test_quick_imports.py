import subprocess
import sys

from tests.support.commands import ROOT

SEARCH = """
import sys
import vlm.search.search_index
heavy = {"transformers", "torch._dynamo", "sympy", "matplotlib", "accelerate"} & set(sys.modules)
assert not heavy, heavy
"""

AFTERWARDS = """
import vlm.models.quick_imports, open_clip, torch, timm
import transformers, torch._dynamo.utils, torchvision.ops
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlm.models.build import build_encoder

assert transformers.__spec__ and torch._dynamo.__spec__
hf = open_clip.hf_model
assert hf.AutoModel.from_config.__self__ is transformers.AutoModel
assert isinstance(BaseModelOutputWithPooling(), hf.BaseModelOutputWithPooling)
assert not isinstance(1, hf.BaseModelOutputWithPooling)

bert = {"model_type": "bert", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16}
model = build_encoder({
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"hf_model_name": "bert", "hf_config": bert, "hf_proj_type": "linear"},
})
assert isinstance(model.text.transformer, transformers.BertModel)
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.ones(1, 4)], 2).shape[-1] == 2

apart = vlm.models.quick_imports._disable(lambda x: torch.compiler.is_compiling(), reason="a test")
compiled = torch.compile(lambda x: (x + 1, apart(x)), backend="eager")
assert compiled(torch.ones(2))[1] is False
assert apart(torch.ones(2)) is False
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_search_imports_neither_transformers_nor_the_compiler_of_torch():
    run(SEARCH)


def test_what_was_imported_quickly_works_as_ever():
    run(AFTERWARDS)
