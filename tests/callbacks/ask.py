"""Asks two emulators about runs that wait for task tokens. Enters the folder of their programs; leaves a table, and an exit
code that is 0 only if each says what it is written to say here: `same` as `local` and AWS' documentation, or otherwise."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import boto3
import botocore.config
import botocore.exceptions

REGION = "us-east-1"
PATIENCE = 60
ROLE = "arn:aws:iam::000000000000:role/r"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(what, check):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            value = check()
        except OSError:
            value = None
        if value:
            return value
        time.sleep(0.05)
    raise SystemExit(f"FAILED  never came true: {what}")


class Emulator:
    def __init__(self, name, command, port, language, environment):
        self.name, self.language = name, language
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait(f"{name} listens", lambda: socket.create_connection(("127.0.0.1", port), 1).close() or True)
        retries = botocore.config.Config(retries={"total_max_attempts": 1}, inject_host_prefix=False)
        client = lambda service: boto3.client(
            service, region_name=REGION, endpoint_url=self.url, config=retries,
            aws_access_key_id="test", aws_secret_access_key="test",
        )
        self.states, self.sqs = client("stepfunctions"), client("sqs")
        self.queue = self.sqs.create_queue(QueueName="tokens")["QueueUrl"]
        self.machines = 0

    def machine(self, kind="STANDARD", **more):
        """A machine that sends its token to the queue and waits for the answer."""
        task = {"Type": "Task", "Resource": "arn:aws:states:::sqs:sendMessage.waitForTaskToken", "End": True, **more}
        if self.language == "JSONata":
            body = "{% $states.context.Task.Token %}"
            task["Arguments"] = {"QueueUrl": self.queue, "MessageBody": body}
        else:
            task["Parameters"] = {"QueueUrl": self.queue, "MessageBody.$": "$$.Task.Token"}
        definition = {"QueryLanguage": self.language, "StartAt": "Park", "States": {"Park": task}}
        self.machines += 1
        made = self.states.create_state_machine(
            name=f"m{self.machines}", definition=json.dumps(definition), roleArn=ROLE, type=kind
        )
        return made["stateMachineArn"]

    def start(self, machine, name="d1", value="{}"):
        return self.states.start_execution(stateMachineArn=machine, name=name, input=value)["executionArn"]

    def token(self):
        def received():
            messages = self.sqs.receive_message(QueueUrl=self.queue, WaitTimeSeconds=1).get("Messages")
            if messages:
                self.sqs.delete_message(QueueUrl=self.queue, ReceiptHandle=messages[0]["ReceiptHandle"])
                return messages[0]["Body"]

        return wait(f"{self.name} gives a token", received)

    def ended(self, run):
        def closed():
            found = self.states.describe_execution(executionArn=run)
            return found if found["status"] != "RUNNING" else None

        return wait(f"{self.name} ends a run", closed)


def refused(call, **arguments):
    """The error's name, or what was answered."""
    try:
        call(**arguments)
        return "taken"
    except botocore.exceptions.ClientError as error:
        return error.response["Error"]["Code"]


def answered(it):
    run = it.start(it.machine(TimeoutSeconds=30))
    it.states.send_task_success(taskToken=it.token(), output='{"by":"hello"}')
    found = it.ended(run)
    return found["status"], json.loads(found.get("output", "null"))


def failed(it):
    run = it.start(it.machine(TimeoutSeconds=30))
    it.states.send_task_failure(taskToken=it.token(), error="Tunnel.busy", cause="c")
    found = it.ended(run)
    return found["status"], found.get("error")


def started_twice(it):
    machine = it.machine(TimeoutSeconds=30)
    first = it.start(machine)
    it.token()
    try:
        return "the same run" if it.start(machine) == first else "another run"
    except botocore.exceptions.ClientError as error:
        return error.response["Error"]["Code"]


def started_otherwise(it):
    machine = it.machine(TimeoutSeconds=30)
    it.start(machine)
    it.token()
    return refused(it.states.start_execution, stateMachineArn=machine, name="d1", input='{"n":1}')


def used_twice(it):
    it.start(it.machine(TimeoutSeconds=30))
    token = it.token()
    it.states.send_task_success(taskToken=token, output="{}")
    return refused(it.states.send_task_success, taskToken=token, output="{}")


def silent(it):
    began = time.monotonic()
    run = it.start(it.machine(TimeoutSeconds=20, HeartbeatSeconds=2))
    it.token()
    it.ended(run)
    return "ended by the heartbeat" if time.monotonic() - began < 15 else "ended by the time-out"


def late(it):
    run = it.start(it.machine(TimeoutSeconds=2))
    token = it.token()
    it.ended(run)
    return "refused" if refused(it.states.send_task_success, taskToken=token, output="{}") != "taken" else "taken"


def next_token(it):
    retry = [{"ErrorEquals": ["Busy"], "IntervalSeconds": 1, "MaxAttempts": 1}]
    it.start(it.machine(TimeoutSeconds=30, Retry=retry))
    first = it.token()
    it.states.send_task_failure(taskToken=first, error="Busy", cause="c")
    return "another token" if it.token() != first else "the same token"


def stopped(it):
    run = it.start(it.machine(TimeoutSeconds=30))
    it.token()
    it.states.stop_execution(executionArn=run, error="Tired", cause="c")
    return it.ended(run)["status"]


# What is asked, what `local` does, and what each emulator does: None where it does the same.
QUESTIONS = [
    (answered, ("SUCCEEDED", {"by": "hello"}), {}),
    (failed, ("FAILED", "Tunnel.busy"), {}),
    (started_twice, "the same run", {"ministack": "ExecutionAlreadyExists"}),
    (started_otherwise, "ExecutionAlreadyExists", {}),
    (used_twice, "TaskTimedOut", {"moto": "InvalidToken", "ministack": "TaskDoesNotExist"}),
    (silent, "ended by the heartbeat", {"ministack": "ended by the time-out"}),
    (late, "refused", {}),
    (next_token, "another token", {"moto": "the same token", "ministack": "the same token"}),
    (stopped, "ABORTED", {"moto": "FAILED"}),
]


def main(programs):
    moto_port, ministack_port = free_port(), free_port()
    emulators = [
        Emulator("moto", [f"{programs}/moto_server", "-p", str(moto_port)], moto_port, "JSONPath", {}),
        Emulator(
            "ministack", [f"{programs}/ministack"], ministack_port, "JSONata",
            {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(ministack_port), "MINISTACK_HOST": "127.0.0.1"},
        ),
    ]
    wrong = 0
    try:
        configuration = json.dumps({"stepfunctions": {"execute_state_machine": True}}).encode()
        to_moto = urllib.request.Request(f"{emulators[0].url}/moto-api/config", data=configuration, method="POST")
        to_moto.add_header("content-type", "application/json")
        urllib.request.urlopen(to_moto).close()
        for question, ours, theirs in QUESTIONS:
            for it in emulators:
                expected = theirs.get(it.name, ours)
                try:
                    found = question(it)
                except botocore.exceptions.ClientError as error:
                    found = f"refused: {error.response['Error']['Code']}"
                verdict = "same" if found == ours else "otherwise"
                if found != expected:
                    verdict, wrong = f"CHANGED, expected {expected}", wrong + 1
                print(f"{question.__name__:18} {it.name:10} {it.language:9} {found!s:45} {verdict}", flush=True)
    finally:
        for it in emulators:
            it.process.terminate()
            it.process.wait()
    return 1 if wrong else 0


sys.exit(main(sys.argv[1]))
