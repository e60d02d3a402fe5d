"""Asks the finished file and its base the same benchmark questions and pairs the answers, question by
question.
"""
