"""One walk finds the images below a folder, and counts what it leaves out."""

import os

from vlm.data.image_folder import images_below


def test_images_are_found_by_their_suffix_and_the_rest_is_counted(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/._c.JPG", ".hidden/d.png", "notes.txt", "album.jpg/e.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.webp").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe.png")
    found = images_below(tmp_path)
    names = ["a/c.JPG", "album.jpg/e.gif", "b.png", "gone.webp"]
    assert found.paths == [tmp_path / name for name in names]
    assert found.left_out == {
        "hidden": 2, "with another suffix": 1, "links to folders": 1, "not regular files": 1,
    }  # fmt: skip


def test_a_folder_that_is_missing_holds_nothing(tmp_path):
    assert images_below(tmp_path / "gone") == ([], {})
