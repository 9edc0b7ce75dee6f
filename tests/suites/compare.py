"""Compares two reports of one suite, test by test."""

import sys
import xml.etree.ElementTree as tree


def outcomes(path):
    found = {}
    for case in tree.parse(path).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}.{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return found


direct, tunnel = (outcomes(path) for path in sys.argv[1:3])
differ = [name for name in sorted(direct.keys() | tunnel.keys()) if direct.get(name) != tunnel.get(name)]
for name in differ:
    print(f"DIFFERS {name}: directly {direct.get(name)}, through the tunnel {tunnel.get(name)}")
passed = sum(outcome == "passed" for outcome in tunnel.values())
print(f"{len(tunnel)} tests, {passed} passed through the tunnel, {len(differ)} differ from direct")
sys.exit(bool(differ) or not tunnel)
