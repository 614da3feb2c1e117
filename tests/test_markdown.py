"""Tables in Markdown line up and hold any text."""

from markdown_it import MarkdownIt

from vlm.markdown import markdown_table


def test_columns_line_up_in_a_terminal_where_chinese_takes_two_columns():
    assert markdown_table(["word", "count"], [["猫", "1"], ["rabbit", "23"]]) == (
        "| word   | count |\n"
        "| ------ | ----: |\n"
        "| 猫     |     1 |\n"
        "| rabbit |    23 |"
    )  # fmt: skip


def test_pipes_and_lines_stay_within_their_cells():
    table = markdown_table(["a|b", "c"], [["|", "`x|y`"], ["one\n two\r\nthree", "4"]])
    assert len({len(line) for line in table.splitlines()}) == 1
    page = MarkdownIt("commonmark").enable("table").render(table)
    assert "<th>a|b</th>" in page
    assert "<td>|</td>" in page
    assert "<code>x|y</code>" in page
    assert "<td>one two three</td>" in page
