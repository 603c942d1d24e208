"""Findings as JUnit XML, which CI services show as test results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from fdcompile.io import atomic_write
from fdcompile.tools.gate.baseline import Finding, difference_table


def write_junit(findings: Sequence[Finding], path: Path) -> None:
    """A test case for each figure, failed where it is not as expected."""
    failures = sum(not own.passed for own in findings)
    suite = ElementTree.Element(
        "testsuite", name="fdcompile gate", tests=str(len(findings)), failures=str(failures), errors="0"
    )
    for own in findings:
        case = ElementTree.SubElement(suite, "testcase", classname="fdcompile.gate", name=own.figure)
        if not own.passed:
            failure = ElementTree.SubElement(case, "failure", message=f"expected {own.expected}, found {own.found}")
            failure.text = difference_table([own])
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    with atomic_write(path) as partial:
        ElementTree.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)
