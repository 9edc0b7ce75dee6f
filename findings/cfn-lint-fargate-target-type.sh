#!/usr/bin/env bash
# cfn-lint (PyPI, 1.58.0): a Fargate service behind a target group of instances passes without a word.
#
# Expected: tasks in the network mode awsvpc are registered by address, so a service on Fargate needs a target group with
#           TargetType ip; the default is instance, and ECS refuses the service when the stack is made.
# Seen:     exit code 0 and no message, with TargetType left out, although the linter follows references between
#           the same resources for other rules (E3047 Cpu and Memory, E3053 ports).
# Source:   the ECS guide, "load balancing for Fargate" (choose ip as the target type); run below.
# For us:   the template's own test asks for ip.
# Needs:    python3 with venv.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check cfn-lint==1.58.0
template() { # CPU
  cat <<YML
AWSTemplateFormatVersion: '2010-09-09'
Parameters:
  Vpc: {Type: 'AWS::EC2::VPC::Id'}
  SubnetA: {Type: 'AWS::EC2::Subnet::Id'}
  SubnetB: {Type: 'AWS::EC2::Subnet::Id'}
  Group: {Type: 'AWS::EC2::SecurityGroup::Id'}
  ExecutionRole: {Type: String}
Resources:
  Cluster: {Type: 'AWS::ECS::Cluster'}
  Balancer:
    Type: AWS::ElasticLoadBalancingV2::LoadBalancer
    Properties: {Scheme: internal, Subnets: [!Ref SubnetA, !Ref SubnetB], SecurityGroups: [!Ref Group]}
  Targets:
    Type: AWS::ElasticLoadBalancingV2::TargetGroup
    Properties: {VpcId: !Ref Vpc, Port: 8080, Protocol: HTTP}
  Listener:
    Type: AWS::ElasticLoadBalancingV2::Listener
    Properties:
      LoadBalancerArn: !Ref Balancer
      Port: 80
      Protocol: HTTP
      DefaultActions: [{Type: forward, TargetGroupArn: !Ref Targets}]
  Task:
    Type: AWS::ECS::TaskDefinition
    Properties:
      RequiresCompatibilities: [FARGATE]
      NetworkMode: awsvpc
      Cpu: '$1'
      Memory: '512'
      ExecutionRoleArn: !Ref ExecutionRole
      ContainerDefinitions:
        - {Name: app, Image: 'busybox:1', PortMappings: [{ContainerPort: 8080}]}
  Service:
    Type: AWS::ECS::Service
    DependsOn: Listener
    Properties:
      Cluster: !Ref Cluster
      LaunchType: FARGATE
      TaskDefinition: !Ref Task
      NetworkConfiguration:
        AwsvpcConfiguration: {Subnets: [!Ref SubnetA, !Ref SubnetB], SecurityGroups: [!Ref Group]}
      LoadBalancers: [{ContainerName: app, ContainerPort: 8080, TargetGroupArn: !Ref Targets}]
YML
}
template 256 >"$folder/described.yml"
# The linter does look: a size that Fargate does not have is an error.
template 300 >"$folder/looked.yml"
code=0
said=$("$folder/venv/bin/cfn-lint" "$folder/described.yml") || code=$?
echo "no TargetType: exit code $code, ${said:-nothing said}"
[ "$code" = 0 ] && [ -z "$said" ] || { echo 'no longer as described' >&2; exit 1; }
if "$folder/venv/bin/cfn-lint" "$folder/looked.yml" >"$folder/looked" 2>&1; then echo 'the linter does not look at the task' >&2; exit 1; fi
grep -q E3047 "$folder/looked"
echo 'as described: the missing target type is not seen'
