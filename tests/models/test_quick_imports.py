import subprocess
import sys

import pytest

from tests.builders import of_split
from tests.support.commands import ROOT
from vlm.embedding.parts import SplitImages, write_embeddings
from vlm.search.search_index import build_search_index

SEARCH = """
import sys
from vlm.cli.main import main
assert main(["search", sys.argv[1], "--text", "red apple"]) == 0
heavy = {"transformers", "torch._dynamo", "sympy", "matplotlib", "accelerate", "pyarrow.compute"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
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


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_search_imports_no_library_that_it_can_do_without(
    embedder, bundle, data_folder, tmp_path
):
    write_embeddings(
        embedder, SplitImages(of_split(data_folder, "test")), tmp_path / "embeddings", bundle=bundle
    )
    build_search_index(tmp_path / "embeddings", tmp_path / "index")
    run(SEARCH, str(tmp_path / "index"))


@pytest.mark.slow
def test_what_was_imported_quickly_works_as_ever():
    run(AFTERWARDS)
