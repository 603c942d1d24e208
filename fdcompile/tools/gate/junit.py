"""Findings as JUnit XML, which CI services show as test results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from fdcompile.io import atomic_write
from fdcompile.tools.gate.baseline import Finding, difference_table


def write_junit(findings: Sequence[Finding], path: Path) -> None:
    """Writes a test case for each figure, which fails if the finding has not passed."""
    failures = sum(not finding.passed for finding in findings)
    suite = ElementTree.Element(
        "testsuite", name="fdcompile gate", tests=str(len(findings)), failures=str(failures), errors="0"
    )
    for finding in findings:
        case = ElementTree.SubElement(suite, "testcase", classname="fdcompile.gate", name=finding.figure)
        if not finding.passed:
            message = f"expected {finding.expected}, found {finding.measured}"
            failure = ElementTree.SubElement(case, "failure", message=message)
            failure.text = difference_table([finding])
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    with atomic_write(path) as partial:
        ElementTree.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)
