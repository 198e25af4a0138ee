#!/bin/bash
# A step of preprocessing as a job: accept_rejected.sh python -m preprocessing.mimic_cxr organise ...
# Its code 3 says that some files were rejected for good, which TARGET/rejected.csv lists; to do it again would change
# nothing. Code 75, files that may be read the next time, stays a failure: the job is to be tried again.
# The first process of a container does not pass a signal on by itself.
"$@" &
child=$!
trap 'told=yes; kill -TERM "$child"' TERM
told=yes
while [[ $told ]]; do # the signal ends the wait, and not yet the child
    told='' code=0
    wait "$child" || code=$?
done
exit $((code == 3 ? 0 : code))
