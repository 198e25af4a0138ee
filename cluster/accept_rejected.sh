#!/bin/bash
# A step of preprocessing as a job: accept_rejected.sh python -m preprocessing.mimic_cxr organise ...
# Its code 3 says that some files were rejected, which TARGET/rejected.csv lists; to do it again would change nothing.
code=0
"$@" || code=$?
exit $((code == 3 ? 0 : code))
