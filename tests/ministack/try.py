"""Deploys the packaged template to ministack and has the real functions serve the real agentd there.

Enters the folder of the packaged template, the folder of the binaries and the program `ministack`. Leaves
a report on standard output, and an exit code that is 0 only if everything that can work there did.
"""

import http.server
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile

import botocore.config
import botocore.session

REGION = "eu-central-1"
STAGE = "dev"
PATIENCE = 120

# Does what two integrations of the run would do: ministack's workflows know no `apigateway:invoke`, and give
# the result of `aws-sdk:sqs` the shape of its old XML protocol.
STAND_IN = """
import json, os, urllib.request
def handler(event, context):
    headers = {"authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/" + os.environ["AWS_REGION"]
        + "/sqs/aws4_request"}
    if "queue" in event:
        url = os.environ["ENDPOINT"]
        headers["x-amz-target"] = "AmazonSQS." + event["queue"]
        headers["content-type"] = "application/x-amz-json-1.0"
        method, body = "POST", event["arguments"]
    else:
        url = os.environ["CONNECTIONS"] + event["path"]
        method, body = event["method"], event.get("body")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, method=method, data=data, headers=headers)
    with urllib.request.urlopen(request) as answer:
        text = answer.read()
    return json.loads(text) if "queue" in event and text else {}
"""


def fail(text):
    raise SystemExit(f"FAILED  {text}")


def wait(what, check):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = check()
        if value:
            return value
        time.sleep(0.05)
    fail(f"never came true: {what}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url, method="GET", data=None, headers=None):
    request = urllib.request.Request(url, method=method, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


class Upstream(http.server.BaseHTTPRequestHandler):
    """What the tunnel leads to."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(201)
        self.send_header("content-length", str(len(body) + 5))
        self.end_headers()
        self.wfile.write(b"echo:" + body)

    def log_message(self, *_):
        pass


def zip_of(binary, more=()):
    """A function's zip: its program, stripped like that of a release, and what else it needs."""
    with tempfile.NamedTemporaryFile() as stripped:
        subprocess.run(["strip", "-o", stripped.name, binary], check=True)
        content = pathlib.Path(stripped.name).read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, data, mode in [("bootstrap", content, 0o755), *more]:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return archive.getvalue()


def fit(template, supported):
    """Takes out of the template what ministack does not know. Returns what that was."""
    missing = {}
    for name, resource in list(template["Resources"].items()):
        kind = resource["Type"]
        known = kind in supported or kind.startswith("Custom::")
        if kind == "AWS::CloudWatch::Alarm" and "Metrics" in resource["Properties"]:
            kind, known = "AWS::CloudWatch::Alarm with metric math", False
        if not known:
            missing.setdefault(kind, []).append(name)
            del template["Resources"][name]
    gone = {name for names in missing.values() for name in names}
    for resource in template["Resources"].values():
        wanted = resource.get("DependsOn")
        if isinstance(wanted, list):
            resource["DependsOn"] = [name for name in wanted if name not in gone]
        elif wanted in gone:
            del resource["DependsOn"]
    return missing


def spell_out(template):
    """ministack's secrets in a stack know no `ExcludePunctuation`: the same in other words."""
    for name, resource in template["Resources"].items():
        generate = resource.get("Properties", {}).get("GenerateSecretString", {})
        if generate.pop("ExcludePunctuation", False):
            generate["ExcludeCharacters"] = string.punctuation
            yield name


def replace_integrations(template):
    """Has a function do what ministack's workflows cannot. Returns the states, by what they lack."""
    machine = template["Resources"]["PublicRequest"]["Properties"]
    definition = json.loads(machine["DefinitionString"])
    replaced = {}
    for name, state in definition["States"].items():
        integration = state.get("Resource", "").removeprefix("arn:aws:states:::")
        arguments = state.get("Arguments")
        if integration == "apigateway:invoke":
            payload = {"method": arguments["Method"], "path": arguments["Path"]}
            if "RequestBody" in arguments:
                payload["body"] = arguments["RequestBody"]
        elif integration.startswith("aws-sdk:sqs:"):
            action = integration.removeprefix("aws-sdk:sqs:")
            payload = {"queue": action[0].upper() + action[1:], "arguments": arguments}
            state.setdefault("Output", "{% $states.result.Payload %}")
        elif state["Type"] == "Succeed" and "Output" in state:
            state.update(Type="Pass", End=True)
            replaced.setdefault("Succeed", []).append(name)
            continue
        else:
            continue
        state["Resource"] = "arn:aws:states:::lambda:invoke"
        state["Arguments"] = {"FunctionName": "ministack-stand-in", "Payload": payload}
        replaced.setdefault(integration.rsplit(":", 1)[0], []).append(name)
    machine["DefinitionString"] = json.dumps(definition)
    # Where connections are is known only when the API is there; set below.
    template["Resources"]["StandIn"] = {
        "Type": "AWS::Lambda::Function",
        "Properties": {
            "FunctionName": "ministack-stand-in",
            "Runtime": "python3.12",
            "Handler": "index.handler",
            "Role": "arn:aws:iam::000000000000:role/stand-in",
            "Code": {"ZipFile": STAND_IN},
        },
    }
    return replaced


def main():
    work, binaries, program = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
    packaged = work / ".serverless"
    create = json.loads((packaged / "cloudformation-template-create-stack.json").read_text())
    template = json.loads((packaged / "cloudformation-template-update-stack.json").read_text())
    from ministack.services.cloudformation.provisioners import _RESOURCE_HANDLERS as supported

    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    environment = {
        **os.environ, **keys, "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "MINISTACK_HOST": "127.0.0.1",
        "MINISTACK_REGION": REGION, "AWS_DEFAULT_REGION": REGION, "LAMBDA_EXECUTOR": "local", "TMPDIR": str(work),
        # Handed on to the functions.
        "AWS_ENDPOINT_URL": endpoint,
    }
    processes = []
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    log = open(work / "ministack.log", "wb")

    def start(command, output, **more):
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **more)
        processes.append(process)
        return process

    def alive():
        if emulator.poll() is not None:
            fail(f"ministack ended: {(work / 'ministack.log').read_text()[-2000:]}")
        try:
            return fetch(f"{endpoint}/_ministack/health")[0] == 200
        except OSError:
            return False

    try:
        emulator = start([program], log, env=environment)
        wait("ministack answers", alive)
        session = botocore.session.get_session()
        session.set_credentials("test", "test")

        def client(service):
            config = botocore.config.Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
            return session.create_client(service, region_name=REGION, endpoint_url=endpoint, config=config)

        formation = client("cloudformation")

        def finished(stack):
            def check():
                status = formation.describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]
                return None if status.endswith("IN_PROGRESS") else status

            status = wait(f"the stack {stack} is there", check)
            if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
                events = formation.describe_stack_events(StackName=stack)["StackEvents"]
                reasons = [
                    f"{event['LogicalResourceId']}: {event.get('ResourceStatusReason')}"
                    for event in events
                    if "FAILED" in event["ResourceStatus"]
                ]
                fail(f"stack {status}: {'; '.join(reasons)}")

        # As osls deploys: the bucket, the zips, everything.
        missing = fit(create, supported)
        formation.create_stack(StackName="tunnel-dev", TemplateBody=json.dumps(create))
        finished("tunnel-dev")
        resources = formation.describe_stack_resources(StackName="tunnel-dev")["StackResources"]
        bucket = next(own["PhysicalResourceId"] for own in resources if own["ResourceType"] == "AWS::S3::Bucket")
        missing = fit(template, supported)
        store = client("s3")
        sizes = {}
        for name, resource in template["Resources"].items():
            if resource["Type"] != "AWS::Lambda::Function":
                continue
            function = name.removesuffix("LambdaFunction").lower()
            more = [("jwks.json", (work / "jwks.json").read_bytes(), 0o644)] if function == "authorizer" else []
            content = zip_of(binaries / function, more)
            sizes[function] = len(content)
            store.put_object(Bucket=bucket, Key=resource["Properties"]["Code"]["S3Key"], Body=content)
        replaced = replace_integrations(template)
        secrets = list(spell_out(template))
        # Too long to be sent as it is: from the bucket, as osls does it.
        store.put_object(Bucket=bucket, Key="template.json", Body=json.dumps(template).encode())
        formation.update_stack(
            StackName="tunnel-dev",
            TemplateURL=f"{endpoint}/{bucket}/template.json",
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        finished("tunnel-dev")
        resources = {
            own["LogicalResourceId"]: own["PhysicalResourceId"]
            for own in formation.describe_stack_resources(StackName="tunnel-dev")["StackResources"]
        }
        print(f"ok      {len(resources)} of {len(resources) + sum(map(len, missing.values()))} resources were made")
        for kind, names in sorted(missing.items()):
            print(f"absent  {kind}, which ministack does not know: {', '.join(names)}")
        print(f"changed {', '.join(replaced['apigateway'])}: `apigateway:invoke` is unknown there, a function does it")
        states = ", ".join(replaced["aws-sdk:sqs"])
        print(f"changed {states}: `aws-sdk:sqs` has results of another shape there, a function does it")
        states = ", ".join(replaced["Succeed"])
        print(f"changed {states}: `Succeed` ignores its `Output` there, `Pass` does not")
        print(f"changed {', '.join(secrets)}: `ExcludePunctuation` is unknown there, `ExcludeCharacters` says the same")

        api = resources["AgentsApi"]
        connections = f"{endpoint}/_aws/execute-api/{api}/{STAGE}"
        functions = client("lambda")
        functions.update_function_configuration(
            FunctionName="ministack-stand-in",
            Environment={"Variables": {"CONNECTIONS": connections, "ENDPOINT": endpoint}},
        )
        # An address of AWS's form leads nowhere here.
        ingress = functions.get_function_configuration(FunctionName=resources["IngressLambdaFunction"])
        variables = {**ingress["Environment"]["Variables"], "TUNNEL_AGENT_ENDPOINT": connections}
        functions.update_function_configuration(
            FunctionName=resources["IngressLambdaFunction"], Environment={"Variables": variables}
        )
        print(f"changed TUNNEL_AGENT_ENDPOINT of ingress: {connections}")
        for name, size in sorted(sizes.items()):
            print(f"ok      {name}: zip of {size} bytes, build of this host")

        queues = client("sqs").list_queues(QueueNamePrefix="tunnel-dev-mailbox-").get("QueueUrls", [])
        if len(queues) < 64:
            fail(f"`sweep` made {len(queues)} mailboxes when the stack was made")
        print(f"ok      custom resource Mailboxes: `sweep` made {len(queues)} mailboxes")

        agentd = binaries / "agentd"
        issue = [agentd, "token", "issue", "--key", "signing-key.pem", "--owner", "me", "--tunnel", "web", "--expires", "1h"]
        token = subprocess.run(issue, cwd=work, check=True, capture_output=True).stdout
        (work / "token").write_bytes(token)
        os.chmod(work / "token", 0o600)
        edge = f"ws://127.0.0.1:{port}/_aws/execute-api/{api}/{STAGE}"

        def agent(token_file, name):
            output = open(work / f"{name}.log", "wb")
            address = f"127.0.0.1:{upstream.server_port}"
            command = [agentd, "http", address, "--name", "web", "--edge", edge, "--token-file", token_file]
            return start(command, output, cwd=work), work / f"{name}.log"

        # A token of a key that nobody knows.
        (work / "other").mkdir()
        subprocess.run([agentd, "keys", "new"], cwd=work / "other", check=True, capture_output=True)
        forged = subprocess.run(issue, cwd=work / "other", check=True, capture_output=True).stdout
        (work / "forged").write_bytes(forged)
        os.chmod(work / "forged", 0o600)
        refused, _ = agent("forged", "forged")
        if refused.wait(timeout=PATIENCE) != 77:
            fail(f"a forged token ended agentd with {refused.returncode}")
        print("ok      $connect: `authorizer` refuses a forged token, agentd ends with 77")

        served, output = agent("token", "agentd")
        table = resources["ConnectionsTable"]
        tables = client("dynamodb")

        def rows():
            if served.poll() is not None:
                fail(f"agentd ended: {output.read_text()}")
            found = tables.scan(TableName=table)["Items"]
            return [row for row in found if "agent" in row and row["tunnel"]["S"] == "web"]

        [row] = wait("hello is answered", rows)
        wait("welcome arrives", lambda: "web" in output.read_text())
        print(f"ok      $connect, hello, welcome: the tunnel web is open on {row['connection_id']['S']}")
        print(f"        {output.read_text().strip().splitlines()[0]}")

        urls = functions.list_function_url_configs(FunctionName=resources["IngressLambdaFunction"])
        url_id = urls["FunctionUrlConfigs"][0]["FunctionUrl"].split("//")[1].split(".")[0]
        public = f"{endpoint}/_aws/lambda-url/{url_id}"
        status, headers, body = fetch(f"{public}/web/path?x=1", "POST", b"hello")
        own = {name.lower(): value for name, value in headers.items()}
        if (status, body) != (201, b"echo:hello"):
            events = client("logs").filter_log_events(logGroupName="/aws/lambda/tunnel-dev-ingress")["events"]
            log_text = "\n".join(event["message"] for event in events)
            fail(f"a public request was answered with {status} {own.get('x-tunnel-error')} {body[:200]}\n{log_text}")
        print(f"ok      ingress, run, $default, mailbox: 201 through the tunnel, id {own['x-tunnel-request-id']}")
        status, headers, _ = fetch(f"{public}/nobody/")
        own = {name.lower(): value for name, value in headers.items()}
        if (status, own.get("x-tunnel-error")) != (404, "no_such_tunnel"):
            fail(f"an unknown tunnel is {status}")
        print("ok      ingress, run: 404 no_such_tunnel")

        os.killpg(served.pid, signal.SIGTERM)
        served.wait(timeout=PATIENCE)
        wait("$disconnect removes the rows", lambda: not [
            row for row in tables.scan(TableName=table)["Items"] if row["tunnel"]["S"].startswith("#")
        ])
        print("ok      $disconnect: the rows of the connection are gone")

        formation.delete_stack(StackName="tunnel-dev")
        wait("the mailboxes are deleted with the stack", lambda: not client("sqs").list_queues(
            QueueNamePrefix="tunnel-dev-mailbox-").get("QueueUrls"))
        print("ok      stack deleted: `sweep` left no mailbox behind")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
        upstream.shutdown()
        keep = os.environ.get("MINISTACK_LOGS")
        if keep:
            shutil.copytree(work, keep, dirs_exist_ok=True, symlinks=True,
                            ignore=shutil.ignore_patterns("node_modules", "target", "ministack-*"))


main()
